"""Evaluation over the wire: held-out questions, asked of a running server, scored and reported."""
