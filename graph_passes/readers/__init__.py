"""Recognise a form: ``read(graph, node) -> MoEBlock | Refusal``. A reader never changes the graph."""
