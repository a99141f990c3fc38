"""What is looked at while a stage trains."""
