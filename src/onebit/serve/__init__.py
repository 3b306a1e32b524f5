"""An HTTP server with the API of OpenAI, for models that are loaded already."""
