"""OpenAssistant Conversations (oasst1): message trees; rows {message_tree_id, prompt, ...}."""
