"""Problems of the ops, one file for each op or for related ones.

Each file has ``PROBLEMS``, a list of :class:`cpc_ext.op_checks.agreement.Problem`.
"""
