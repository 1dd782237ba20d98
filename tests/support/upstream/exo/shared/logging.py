import logging

logger = logging.getLogger("exo")
