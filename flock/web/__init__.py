"""What HTTP needs beside the routes of ``flockapi``."""
