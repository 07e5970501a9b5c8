"""What any pass needs of a graph: to look around in it, to add nodes, to put them in order, to tell its size."""
