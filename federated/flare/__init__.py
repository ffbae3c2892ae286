"""Components of an NVFlare job: the site's training, its filters, the audit of its update."""
