"""One file for each op: its sizes, who implements it, what is right, and what it needs."""
