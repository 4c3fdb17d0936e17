"""``adaswitch doctor``: what of a machine, and of a configuration on it, is right, and what to do where it is not.

    gather   looks at the machine         -> Facts
    checks   judges the facts             -> Findings; pure (software, hardware, room)
    report   shows the findings

Starts no engine and no run; needs neither torch, Ray nor vLLM to say that they are missing.
"""
