"""Problems of the ops, one file an op.

Each has ``PROBLEMS``, a list of :class:`cpc_ext.op_checks.agreement.Problem`.
"""
