def water(plant, litres):
    water_level = plant["water_level"] + litres
    return {**plant, "water_level": water_level}


def underwater(plant):
    return plant["water_level"] > 100
