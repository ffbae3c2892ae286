"""Building networks: architectures, BatchNorm over processes, layers of a malicious server."""

# Its networks register themselves with the builder.
from core.models import literature as literature
