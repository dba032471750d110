"""One file a filter: its rules, its decision, what it drops and why."""
