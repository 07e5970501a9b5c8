"""What makes measurements worth something: a process of their own, cores that stay, the machine they were made on."""
