"""Networks alone: no data, no training.

.. include:: ../../docs/networks.md
"""
