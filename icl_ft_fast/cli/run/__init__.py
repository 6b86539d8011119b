"""What each command does, a module a command; imported when the command runs, since it loads torch."""
