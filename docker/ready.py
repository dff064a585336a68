#!/usr/bin/env python3
"""Health check of the service's container: exit status 0 when it takes requests."""

import os
import sys
import urllib.error
import urllib.request

port = os.environ.get("REFINERY_PORT", "8000")
try:
    # No proxy of the environment: the service is in this container.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}/readyz", timeout=4) as answer:
        sys.exit(answer.status != 200)
except urllib.error.HTTPError as error:
    sys.exit(f"/readyz says {error.code}: {error.read(500).decode('utf-8', 'replace')}")
except OSError as error:
    sys.exit(f"port {port} does not answer: {error}")
