"""What no attack can exceed, where it can be computed.

`jacobian` differentiates a shared gradient in the images, `information` turns that into the
smallest error under noise, `private` states what differential privacy itself forbids.
"""
