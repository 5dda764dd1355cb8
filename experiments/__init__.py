"""The replication study: from a collection to tables, figures and a summary."""
