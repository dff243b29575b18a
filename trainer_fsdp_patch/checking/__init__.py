"""`check` as a person sees it: options, what must hold before it, its runs, and what it prints."""
