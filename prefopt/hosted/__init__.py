"""Training that somebody else's machines do; each service in one file."""
