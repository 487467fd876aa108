-- What the task of daily_users.py reads and writes: add-ons, and a count of users for each day.
CREATE TABLE addons (
    id INT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY,
    name VARCHAR(100) NOT NULL,
    average_daily_users INT UNSIGNED NOT NULL DEFAULT 0
) ENGINE=InnoDB;

CREATE TABLE update_counts (
    id INT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY,
    addon_id INT UNSIGNED NOT NULL,
    count INT UNSIGNED NOT NULL,
    date DATE NOT NULL,
    KEY addon_and_count (addon_id, count),
    CONSTRAINT update_counts_addon FOREIGN KEY (addon_id) REFERENCES addons (id)
) ENGINE=InnoDB;

INSERT INTO addons (id, name, average_daily_users) VALUES (55, 'Clock', 7), (3615, 'Tabs', 0);
INSERT INTO update_counts (addon_id, count, date) VALUES
    (55, 7, '2010-05-24'), (55, 7, '2010-05-25'), (3615, 10, '2010-05-24'), (3615, 25, '2010-05-25');
