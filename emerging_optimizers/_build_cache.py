class BuildError(Exception):
    reason = remedy = ""
