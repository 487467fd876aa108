-- first_row
INSERT INTO aioworker_budget (task, last_start, server)
VALUES (%(task)s, '2000-01-01', CONCAT(@@hostname, ':', @@port, ':', @@server_id)) ON DUPLICATE KEY UPDATE starts = starts;

-- peek
SELECT paused, gap_us, TIMESTAMPDIFF(MICROSECOND, last_start, SYSDATE(6)),
    last_start, server = CONCAT(@@hostname, ':', @@port, ':', @@server_id), COALESCE(IS_USED_LOCK(%(lock)s), 0), CONNECTION_ID(),
    starts, holder, paused_by, paused_at, paused_why, set_by, set_at, set_why
FROM aioworker_budget WHERE task = %(task)s;

-- join
INSERT INTO aioworker_budget (task, last_start, server)
VALUES (%(task)s, SYSDATE(6), CONCAT(@@hostname, ':', @@port, ':', @@server_id)) ON DUPLICATE KEY UPDATE starts = starts;

-- columns
SELECT task, last_start, server, starts, holder, paused, paused_by, paused_at, paused_why, gap_us, set_by, set_at, set_why FROM aioworker_budget LIMIT 0;

-- columns
SELECT id, host, pid, task, version, rate, session, state, reason, since, seen FROM aioworker_worker LIMIT 0;

-- adopt
UPDATE aioworker_budget SET last_start = SYSDATE(6), server = CONCAT(@@hostname, ':', @@port, ':', @@server_id)
WHERE task = %(task)s AND (last_start > SYSDATE(6) OR server <> CONCAT(@@hostname, ':', @@port, ':', @@server_id));

-- charge
UPDATE aioworker_budget
SET last_start = SYSDATE(6), starts = starts + 1, holder = %(worker)s
WHERE task = %(task)s AND NOT paused AND server = CONCAT(@@hostname, ':', @@port, ':', @@server_id)
AND IS_USED_LOCK(%(lock)s) = CONNECTION_ID()
AND last_start <= SYSDATE(6) - INTERVAL COALESCE(gap_us, %(gap)s) MICROSECOND;

-- stamp
UPDATE aioworker_budget SET last_start = SYSDATE(6)
WHERE task = %(task)s AND IS_USED_LOCK(%(lock)s) = CONNECTION_ID();

-- update
UPDATE aioworker_worker
SET since = IF(state = %(state)s AND reason = %(reason)s, since, SYSDATE(6)), state = %(state)s,
    reason = %(reason)s, seen = SYSDATE(6), session = CONNECTION_ID() WHERE id = %(id)s;

-- insert
INSERT INTO aioworker_worker
(id, host, pid, task, version, rate, session, state, reason, since, seen)
VALUES (%(id)s, %(host)s, %(pid)s, %(task)s, %(version)s, %(rate)s, CONNECTION_ID(), %(state)s,
    %(reason)s, SYSDATE(6), SYSDATE(6));

-- others
SELECT rate FROM aioworker_worker WHERE task = %(task)s AND id <> %(id)s
AND seen > SYSDATE(6) - INTERVAL 90 SECOND;

-- sweep
DELETE FROM aioworker_worker WHERE seen < SYSDATE(6) - INTERVAL 3600 SECOND;

-- leave
DELETE FROM aioworker_worker WHERE id = %(id)s;

-- set_rate
UPDATE aioworker_budget SET gap_us = %(value)s,
    set_by = %(who)s, set_at = SYSDATE(6), set_why = %(why)s WHERE task = %(task)s;

-- set_paused
UPDATE aioworker_budget SET paused = %(value)s,
    paused_by = %(who)s, paused_at = SYSDATE(6), paused_why = %(why)s WHERE task = %(task)s;

-- holder
SELECT host, pid FROM aioworker_worker WHERE session = %(session)s AND task = %(task)s ORDER BY seen DESC LIMIT 1;

-- workers
SELECT host, pid, version, rate, session, state, reason, since, seen,
    TIMESTAMPDIFF(MICROSECOND, seen, SYSDATE(6)) / 1e6
FROM aioworker_worker WHERE task = %(task)s ORDER BY host, pid;
