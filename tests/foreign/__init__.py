"""MoE graphs as other people make them: torch modules as the field writes them, exported by real exporters."""
