"""The commands as a person meets them: `run`, `status`, `verify`, `repair` and `seams`; `check` has a room."""
