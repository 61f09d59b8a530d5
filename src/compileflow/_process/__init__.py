"""Child processes, CPU features, installed packages, work folders and the state of this process."""
