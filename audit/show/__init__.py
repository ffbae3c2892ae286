"""How an audit is stored and shown: `audit.json`, the page, `audit.html`, the protocol's report."""
