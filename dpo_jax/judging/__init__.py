"""The page where people vote: items, votes, and the server."""
