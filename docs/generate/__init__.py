"""Pages of the documentation that nobody writes by hand."""
