"""The command `plan`: what was asked, what fits, and the answer as text, as JSON and as a page."""
