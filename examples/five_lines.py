"""A task in five lines: it counts one shop's reviews, at most ten times a second.

Run it in this folder, with RabbitMQ and MariaDB where the settings say:

    mariadb --host 127.0.0.1 --user root aioworker <shop.sql
    aioworker init --app five_lines
    python -c 'import aioworker; aioworker.publish_sync("count_reviews", 1)'
    aioworker consume --app five_lines --burst
"""

from aioworker import Context, task

COUNT = "(SELECT COUNT(*) FROM reviews WHERE shop_id = shops.id)"


@task(rate_limit="10/s")
def count_reviews(ctx: Context, shop: int) -> None:
    """Write how many there are."""
    with ctx.transaction() as cursor:
        cursor.execute(f"UPDATE shops SET reviews = {COUNT} WHERE id = %s", (shop,))
