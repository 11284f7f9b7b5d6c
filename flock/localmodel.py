def serve(x: str) -> str:
    return ""


def bounded_schema(x):
    return x
