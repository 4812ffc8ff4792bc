"""From an answer's text to things: boxes, and pictures with boxes on them."""
