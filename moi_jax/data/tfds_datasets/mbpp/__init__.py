"""MBPP: basic Python tasks with tests; rows {text, code, task_id, test_list, ...}."""
