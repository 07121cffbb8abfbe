"""The routes of the OpenAI API, one module per area."""
