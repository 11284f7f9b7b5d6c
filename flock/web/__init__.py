"""The HTTP layer below the routes of ``flockapi``: access, bodies, responses, problems, pages."""
