"""The pages for people: the playground and the description of the API, as static files."""
