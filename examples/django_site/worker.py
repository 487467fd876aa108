"""What the worker loads: Django, then `tasks.py` of each of its apps.

Run it in this folder, with RabbitMQ and MariaDB where the settings say:

    export DJANGO_SETTINGS_MODULE=settings AIOWORKER_APP=worker
    python manage.py migrate --run-syncdb
    aioworker init
    python manage.py shell -c 'Shop.objects.create(name="Tea").review_set.create(stars=5)'
    aioworker consume --burst

The review's save publishes its shop's id. All shops: `aioworker publish-all update_review_count`.
"""

import django
from django.utils.module_loading import autodiscover_modules

django.setup()
autodiscover_modules("tasks")
