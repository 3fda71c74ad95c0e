"""Glaive tool calls, the demo of LLaMA-Factory; rows {conversations, tools}."""
