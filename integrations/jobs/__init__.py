"""Runs over many images: what each process does, in what order, what it reports and shows meanwhile."""
