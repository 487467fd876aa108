-- What the tasks of shop.py and five_lines.py read and write: shops and what people say of them.
CREATE TABLE shops (
    id INT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY,
    name VARCHAR(100) NOT NULL,
    rating DECIMAL(3, 2) NULL,  -- the average of its reviews' stars; NULL without any
    reviews INT UNSIGNED NOT NULL DEFAULT 0  -- how many it has
) ENGINE=InnoDB;

CREATE TABLE reviews (
    id INT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY,
    shop_id INT UNSIGNED NOT NULL,
    stars TINYINT UNSIGNED NOT NULL,
    KEY shop_id (shop_id, stars),
    CONSTRAINT reviews_shop FOREIGN KEY (shop_id) REFERENCES shops (id)
) ENGINE=InnoDB;

INSERT INTO shops (id, name, rating) VALUES (1, 'Bakery', NULL), (2, 'Books', 3.50), (3, 'Tea', 4);
INSERT INTO reviews (shop_id, stars) VALUES (1, 5), (1, 4), (1, 4), (2, 3), (2, 4);
