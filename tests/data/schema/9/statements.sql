-- first_row
INSERT INTO aioworker_budget (task, last_start, server)
VALUES (%(task)s, '2000-01-01', CONCAT(@@hostname, ':', @@port, ':', @@server_id)) ON DUPLICATE KEY UPDATE starts = starts;

-- peek
SELECT paused, gap_us, TIMESTAMPDIFF(MICROSECOND, GREATEST(LEAST(last_start, TIMESTAMP'9000-01-01 00:00:00'), TIMESTAMP'2000-01-01 00:00:00'), SYSDATE(6)),
    GREATEST(LEAST(last_start, TIMESTAMP'9000-01-01 00:00:00'), TIMESTAMP'2000-01-01 00:00:00'), server = CONCAT(@@hostname, ':', @@port, ':', @@server_id), server, CONCAT(@@hostname, ':', @@port, ':', @@server_id),
    COALESCE(IS_USED_LOCK(%(lock)s), 0), CONNECTION_ID(),
    starts, holder, paused_by, paused_at, paused_why, set_by, set_at, set_why,
    TIMESTAMPDIFF(MICROSECOND, GREATEST(LEAST(IF(last_start <=> GREATEST(last_charge, last_write), last_charge, last_start), TIMESTAMP'9000-01-01 00:00:00'), TIMESTAMP'2000-01-01 00:00:00'), SYSDATE(6)),
    TIMESTAMPDIFF(MICROSECOND, GREATEST(LEAST(IF(last_start <=> GREATEST(last_charge, last_write), last_write, last_start), TIMESTAMP'9000-01-01 00:00:00'), TIMESTAMP'2000-01-01 00:00:00'), SYSDATE(6)),
    bulk_next, runs_now IS NOT NULL, running, deaths, SYSDATE(6), CONCAT(@@read_only) NOT IN ('0', 'OFF') OR @@innodb_read_only
FROM aioworker_budget LEFT JOIN (
    SELECT DISTINCT task AS runs_now FROM aioworker_run WHERE worker IS NOT NULL
) AS run ON runs_now = task
WHERE task = %(task)s;

-- notes
SELECT message, together, most, deaths, worker FROM aioworker_run
WHERE task = %(task)s;

-- columns
SELECT task, last_start, last_charge, last_write, server, starts, holder, bulk_next, paused, paused_by, paused_at, paused_why, gap_us, set_by, set_at, set_why, running, deaths FROM aioworker_budget LIMIT 0;

-- columns
SELECT id, host, pid, task, version, rate, session, state, reason, since, seen, kind, lanes FROM aioworker_worker LIMIT 0;

-- columns
SELECT task, message, together, most, deaths, worker, since FROM aioworker_run LIMIT 0;

-- holder
SELECT host, pid, seen > SYSDATE(6) - INTERVAL 90 SECOND
FROM aioworker_worker WHERE session = %(session)s AND task = %(task)s ORDER BY seen DESC LIMIT 1;

-- tasks
SELECT task FROM aioworker_budget ORDER BY task;

-- rates
SELECT DISTINCT COALESCE(rate, 'none') FROM aioworker_worker
WHERE task = %(task)s AND seen > SYSDATE(6) - INTERVAL 90 SECOND;

-- adopt
UPDATE aioworker_budget SET last_start = SYSDATE(6), server = CONCAT(@@hostname, ':', @@port, ':', @@server_id)
WHERE task = %(task)s AND (last_start > SYSDATE(6) OR server <> CONCAT(@@hostname, ':', @@port, ':', @@server_id));

-- charge
UPDATE aioworker_budget
SET last_write = GREATEST(LEAST(IF(last_start <=> GREATEST(last_charge, last_write), last_write, last_start), TIMESTAMP'9000-01-01 00:00:00'), TIMESTAMP'2000-01-01 00:00:00'), last_charge = SYSDATE(6), last_start = last_charge,
    starts = starts + 1, holder = %(worker)s, bulk_next = 0
WHERE task = %(task)s AND NOT paused AND server = CONCAT(@@hostname, ':', @@port, ':', @@server_id)
AND IS_USED_LOCK(%(lock)s) = CONNECTION_ID()
AND last_start <= SYSDATE(6) AND GREATEST(GREATEST(LEAST(IF(last_start <=> GREATEST(last_charge, last_write), last_charge, last_start), TIMESTAMP'9000-01-01 00:00:00'), TIMESTAMP'2000-01-01 00:00:00') + INTERVAL COALESCE(gap_us, %(gap)s) MICROSECOND,
    GREATEST(LEAST(IF(last_start <=> GREATEST(last_charge, last_write), last_write, last_start), TIMESTAMP'9000-01-01 00:00:00'), TIMESTAMP'2000-01-01 00:00:00') + INTERVAL COALESCE(gap_us, %(gap)s) MICROSECOND - INTERVAL %(usual_us)s MICROSECOND) <= SYSDATE(6);

-- note
INSERT INTO aioworker_run (task, message, together, worker, since)
SELECT %(task)s, message, %(together)s, %(worker)s, SYSDATE(6)
FROM JSON_TABLE(%(messages)s, '$[*]' COLUMNS (message VARCHAR(64) PATH '$')) AS noted
WHERE IS_USED_LOCK(%(lock)s) = CONNECTION_ID()
ON DUPLICATE KEY UPDATE together = %(together)s, worker = %(worker)s, since = SYSDATE(6);

-- can_note
INSERT INTO aioworker_run (task, message, together, since) SELECT task, message, together, since FROM aioworker_run WHERE FALSE;

-- can_note
UPDATE aioworker_run SET worker = NULL WHERE FALSE;

-- can_note
DELETE FROM aioworker_run WHERE FALSE;

-- now
SET @aioworker_now = SYSDATE(6);

-- stamp
UPDATE aioworker_budget
SET last_write = @aioworker_now - INTERVAL %(passed_us)s MICROSECOND,
    last_start = GREATEST(last_charge, last_write)
WHERE task = %(task)s AND IS_USED_LOCK(%(lock)s) = CONNECTION_ID();

-- died
UPDATE aioworker_run
SET deaths = deaths + (together = 1), most = GREATEST(together DIV 2, 1), worker = NULL
WHERE task = %(task)s AND worker IS NOT NULL AND IS_USED_LOCK(%(lock)s) = CONNECTION_ID();

-- old
DELETE FROM aioworker_run
WHERE task = %(task)s AND since < SYSDATE(6) - INTERVAL 7 DAY AND IS_USED_LOCK(%(lock)s) = CONNECTION_ID();

-- forget
DELETE FROM aioworker_run
WHERE task = %(task)s AND message IN %(over)s AND IS_USED_LOCK(%(lock)s) = CONNECTION_ID();

-- lives
UPDATE aioworker_run SET deaths = deaths - 1
WHERE task = %(task)s AND together = 1 AND deaths > 0 AND message IN %(counted)s AND IS_USED_LOCK(%(lock)s) = CONNECTION_ID();

-- import
INSERT INTO aioworker_run (task, message, together, most, deaths, since)
VALUES (%(task)s, 'b', 1, 1, 1, SYSDATE(6))
ON DUPLICATE KEY UPDATE together = 1, most = 1, deaths = deaths + 1;

-- imported
UPDATE aioworker_budget SET running = NULL, deaths = NULL WHERE task = %(task)s;

-- withdraw
UPDATE aioworker_run SET worker = NULL
WHERE task = %(task)s AND worker = %(worker)s AND message IN %(noted)s;

-- withdraw
DELETE FROM aioworker_run
WHERE task = %(task)s AND worker IS NULL AND most IS NULL AND message IN %(noted)s;

-- update
UPDATE aioworker_worker
SET since = IF(state = %(state)s AND reason = %(reason)s, since, SYSDATE(6)), state = %(state)s,
    kind = %(kind)s, reason = %(reason)s, seen = SYSDATE(6) + INTERVAL %(ahead)s SECOND,
    session = CONNECTION_ID(), lanes = %(lanes)s
WHERE id = %(id)s;

-- insert
INSERT INTO aioworker_worker
(id, host, pid, task, version, rate, session, state, kind, reason, since, seen, lanes)
VALUES (%(id)s, %(host)s, %(pid)s, %(task)s, %(version)s, %(rate)s, CONNECTION_ID(), %(state)s,
    %(kind)s, %(reason)s, SYSDATE(6), SYSDATE(6), %(lanes)s);

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

-- workers
SELECT host, pid, version, rate, session, state, kind, reason, since, seen,
    TIMESTAMPDIFF(MICROSECOND, seen, SYSDATE(6)) / 1e6, lanes
FROM aioworker_worker WHERE task = %(task)s ORDER BY host, pid;
