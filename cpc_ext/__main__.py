"""``python -m cpc_ext`` prints what to put into a bug report."""

from cpc_ext.build_info import report

print(report())
