"""Model families and chat templates, and what the project says of the versions it runs with."""
