"""One page from the artifacts of a run: what was made, what it costs, whether it may ship.

It reads what all the other packages wrote, and imports `runtime` for the artifacts that are runtime's own. The page is
one HTML file: charts are drawn by Vega-Lite when it is written (vl-convert), so it needs no network and no server.
"""
