"""What runs the flows, and the servers for those who have none."""
