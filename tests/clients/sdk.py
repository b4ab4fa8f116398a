"""Runs a query that is pending and paged through the proxy with Upsolver's own SDK. Arguments: the proxy's URL, the number of rows expected."""
import sys

from upsolver.dbapi import connect

url, expected = sys.argv[1], int(sys.argv[2])
with connect(token="unused", api_url=url) as connection:
    cursor = connection.cursor()
    cursor.execute("select * from orders")
    rows = cursor.fetchall()
rows = list(rows)
assert len(rows) == expected, f"{len(rows)} rows instead of {expected}: {rows}"
print(f"{len(rows)} rows")
