"""``adaswitch doctor``: checks a machine, and a configuration on it, and says what to do about problems.

    gather   reads the machine's state    -> Facts
    checks   evaluates the facts          -> Findings; pure (software, hardware, resources)
    report   prints the findings

Starts no engine and no run. It works without torch, Ray and vLLM, so that it can report that they are missing.
"""
