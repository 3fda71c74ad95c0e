"""Planning: which instructions form a group and which groups share a row, from lengths alone."""
