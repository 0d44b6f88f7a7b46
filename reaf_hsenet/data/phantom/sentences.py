"""The wording of phantom reports: sentences for findings that are present or absent, and for normal anatomy.

Keys are labels, devices or regions. Changing a sentence here may ask for a rule in labeler.py.
"""

# {place}: lobes, vessels or stations with their article; {side}: right or left; {size}: with its unit.
PRESENT: dict[str, tuple[str, ...]] = {
    "pacemaker": (
        "A pacemaker is observed in the {side} chest wall, with its lead ending in the heart.",
        "There is a cardiac pacemaker generator on the {side} side of the anterior chest wall.",
        "A pacemaker placed on the {side} and its electrode were observed.",
    ),
    "port catheter": (
        "A port catheter entering from the {side} and ending in the superior vena cava is observed.",
        "There is a port chamber under the skin of the {side} chest wall.",
        "A {side}-sided port catheter with its tip in the superior vena cava was observed.",
    ),
    "sternal wires": (
        "Sternal wires secondary to previous surgery are observed.",
        "There are metallic sternotomy sutures.",
        "Sternotomy wires of a past operation were seen.",
    ),
    "spinal screws": (
        "Transpedicular screws are observed in the thoracic vertebrae.",
        "There is metallic spinal fixation material.",
        "Pedicle screws of a previous spinal operation were seen.",
    ),
    "Arterial wall calcification": (
        "Calcified atheroma plaques are observed in the wall of {place}.",
        "There are atherosclerotic wall calcifications in {place}.",
        "Calcific atherosclerotic changes were observed in {place}.",
    ),
    "Cardiomegaly": (
        "Heart size is increased, with a cardiothoracic ratio of {ratio}.",
        "There is cardiomegaly; the cardiothoracic ratio is {ratio}.",
        "The heart is enlarged and the cardiothoracic ratio was measured as {ratio}.",
        "Cardiomegaly is observed (CTR {ratio}).",
    ),
    "Pericardial effusion": (
        "Pericardial effusion reaching {size} in thickness is observed.",
        "There is a pericardial effusion measuring {size} at its thickest point.",
        "An effusion with a thickness of {size} was observed in the pericardial space.",
    ),
    "Coronary artery wall calcification": (
        "Calcified plaques are observed in {place}.",
        "There are calcific atheroma plaques in {place}.",
        "Wall calcifications were observed in {place}.",
    ),
    "Hiatal hernia": (
        "A hiatal hernia with a diameter of {size} is observed.",
        "There is a sliding type hiatal hernia measuring {size} at the lower end of the esophagus.",
        "Hiatal hernia was observed, {size} in size.",
    ),
    "Lymphadenopathy": (
        "A {place} lymph node with a short axis of {size} is observed.",
        "There is {place} lymphadenopathy, {size} in short axis.",
        "An enlarged lymph node measuring {size} in short diameter was observed at the {place} station.",
    ),
    "Emphysema": (
        "There are {kind} emphysematous changes in {place}.",
        "{Kind} emphysema is observed in {place}.",
        "Emphysematous areas of {kind} degree were observed in {place}.",
    ),
    "Mosaic attenuation pattern": (
        "A mosaic attenuation pattern is observed in {place}.",
        "There are mosaic density differences in {place}, suggesting small airway disease.",
        "Mosaic attenuation was observed in {place}.",
    ),
    "Peribronchial thickening": (
        "Peribronchial thickening is observed in {place}.",
        "There is thickening of the bronchial walls in {place}.",
        "Peribronchial wall thickening was observed in {place}.",
    ),
    "Bronchiectasis": (
        "Bronchiectasis is observed in {place}.",
        "There are bronchiectatic changes in {place}.",
        "Bronchiectatic dilatations were observed in {place}.",
    ),
    "Interlobular septal thickening": (
        "Interlobular septal thickening is observed in {place}.",
        "There is thickening of the interlobular septa in {place}.",
        "Smooth interlobular septal thickenings were observed in {place}.",
    ),
    "Lung opacity": (
        "{Kind} ground glass opacities are observed in {place}.",
        "There are {kind} areas of ground-glass density in {place}.",
        "Ground glass density increases of {kind} distribution were observed in {place}.",
    ),
    "Consolidation": (
        "Consolidation with air bronchograms is observed in {place}.",
        "There are consolidation areas in {place}.",
        "Consolidated parenchyma, primarily suggesting infection, was observed in {place}.",
    ),
    "Atelectasis": (
        "Atelectasis is observed in {place}.",
        "There are atelectatic changes with volume loss in {place}.",
        "Atelectatic lung parenchyma was observed in {place}.",
    ),
    "Pulmonary fibrotic sequela": (
        "Pleuroparenchymal sequelae bands are observed in {place}.",
        "There are fibrotic sequelae changes in {place}.",
        "Linear sequela densities were observed in {place}.",
    ),
    "Lung nodule": (
        "A {kind} nodule measuring {size} is observed in {place}.",
        "There is a {kind} nodule of {size} in {place}.",
        "In {place}, a {kind} nodule with a diameter of {size} was observed.",
        "A {kind} nodule, {size} in diameter, was seen in {place}.",
    ),
    "Pleural effusion": (
        "A {amount} pleural effusion measuring {size} at its thickest point is observed on the {side}.",
        "There is a {amount} pleural effusion in the {side} hemithorax, reaching {size} in thickness.",
        "{Side} pleural effusion of {amount} amount, {size} thick, was observed.",
    ),
}

ABSENT: dict[str, tuple[str, ...]] = {
    "Medical material": ("No device or catheter was observed.",),
    "Arterial wall calcification": (
        "No calcified plaque was detected in the aorta.",
        "Thoracic aorta diameter is normal.",
    ),
    "Cardiomegaly": (
        "Heart contour and size are normal.",
        "No cardiomegaly was detected.",
        "Heart size is natural.",
    ),
    "Pericardial effusion": (
        "Pericardial effusion-thickening was not observed.",
        "No pericardial effusion was detected.",
        "There is no effusion in the pericardial space.",
    ),
    "Coronary artery wall calcification": ("Coronary artery calcification was not observed.",),
    "Hiatal hernia": (
        "No hiatal hernia was detected.",
        "Esophageal calibration is normal, without hiatal hernia.",
        "No pathological wall thickening was detected in the esophagus.",
    ),
    "Lymphadenopathy": (
        "No pathologically enlarged lymph nodes were detected in the mediastinum or hilar regions.",
        "Mediastinal lymphadenopathy was not observed.",
        "There are no lymph nodes of pathological size in either axilla.",
    ),
    "Emphysema": ("No emphysema was detected.", "Emphysematous changes were not observed."),
    "Mosaic attenuation pattern": ("Mosaic attenuation was not observed.",),
    "Peribronchial thickening": (
        "No peribronchial thickening was observed.",
        "Bronchial walls are of normal thickness.",
    ),
    "Bronchiectasis": ("Bronchiectasis was not detected.", "Bronchial calibrations are normal."),
    "Interlobular septal thickening": ("Interlobular septal thickening was not observed.",),
    "Lung opacity": (
        "No ground glass opacity was detected.",
        "Ground-glass density was not observed in either lung.",
    ),
    "Consolidation": ("No consolidation was observed.", "There is no area of consolidation in the lungs."),
    "Atelectasis": ("No atelectasis was detected.",),
    "Pulmonary fibrotic sequela": ("There are no sequelae changes.",),
    "Lung nodule": (
        "No nodule was detected in either lung.",
        "A nodule or mass was not observed in the lungs.",
    ),
    "Pleural effusion": (
        "No pleural effusion was detected.",
        "Pleural effusion-thickening was not observed.",
        "There is no pleural effusion on either side.",
    ),
}
ABSENT_SHARE = {
    "Pericardial effusion": 0.4,
    "Pleural effusion": 0.4,
    "Cardiomegaly": 0.3,
    "Lymphadenopathy": 0.3,
}

SUMMARIES = {"Lung opacity": "ground glass opacity", "Pulmonary fibrotic sequela": "fibrotic sequelae"}
NORMAL = {
    "airways": (
        "Trachea and both main bronchi are open.",
        "The trachea is in the midline and the main bronchi are patent.",
        "No occlusive pathology was detected in the trachea and main bronchi.",
    ),
    "vessels": (
        "Mediastinal main vascular structures are normal.",
        "Calibration of the mediastinal great vessels is natural.",
        "The mediastinum could not be evaluated optimally in the non-contrast examination.",
    ),
    "lungs": (
        "When examined in the lung parenchyma window;",
        "In the evaluation of the lung parenchyma;",
    ),
    "clear lungs": (
        "Aeration of both lungs is normal.",
        "No nodular or infiltrative lesion was detected in the lung parenchyma.",
    ),
    "abdomen": (
        "Upper abdominal organs included in the sections are normal.",
        "No space-occupying lesion was detected in the liver within the sections.",
        "Bilateral adrenal glands are natural.",
    ),
    "bones": (
        "Bone structures in the study area are natural.",
        "Vertebral corpus heights are preserved.",
        "No lytic-destructive lesion was detected in the bones.",
    ),
}
