"""Athena, the face of Nexus: pages in a browser that ask the gateway as any client does."""
