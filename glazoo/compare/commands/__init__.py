"""`glazoo capacity`, `decay`, `compare` and `bench`: variants side by side."""
